"""`quantkit report`: what folders of `quantkit make` prove, on self-contained pages, and their figures as PNGs."""
