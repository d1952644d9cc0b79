"""Bad input: one table for each thing that can be wrong, and the way in which a row of it is run."""
