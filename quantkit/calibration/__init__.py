"""Calibration: text through the original weights, importance out."""
