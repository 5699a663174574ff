"""Parts of an image that a network's score depends on."""
