"""Environments made by pip."""
