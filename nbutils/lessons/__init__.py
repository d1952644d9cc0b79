"""What a notebook cell needs and training does not: figures, exercises, records, troubles."""
