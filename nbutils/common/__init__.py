"""Paths, ranks, versions, host memory, provenance: what every room needs. Imports nothing of ours."""
