"""Arithmetic: shapes, memory, time; and the doctor and the links, which measure what it is compared with."""
