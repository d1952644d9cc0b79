"""Arithmetic only: shapes, memory, time; and the doctor, who compares it with this machine."""
