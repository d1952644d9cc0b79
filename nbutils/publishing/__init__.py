"""The series as a product: papermill runner, refresh, workshop, site."""
