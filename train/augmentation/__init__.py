"""Augmentation of training images: its levels, by albumentations and on the device."""
