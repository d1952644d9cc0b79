"""Rows in: forms, templates, what is learned."""
