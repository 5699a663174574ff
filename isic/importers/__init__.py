"""Import of public collections of skin lesions into the challenge's layout."""
