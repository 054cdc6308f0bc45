"""Benchmarks: `make bench`. Every number in the documents comes from here.

Ratios are taken within one run, by alternating what is compared, because machines are noisy.
"""
