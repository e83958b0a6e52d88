"""What `make` left in a folder, checked, described and uploaded to a Hub."""
