"""Writes manifests and class lists from official archives, third-party copies and folders of images."""
