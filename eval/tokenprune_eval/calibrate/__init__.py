"""Calibration: the smallest budget of a method that costs no more accuracy than allowed."""
