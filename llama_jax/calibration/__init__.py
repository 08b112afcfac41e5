"""Weights rounded by what a text's inputs to them are, a layer at a time, and what that costs."""
