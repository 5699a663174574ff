"""Ensembles of ensembles."""
