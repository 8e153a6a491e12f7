"""Reports. In: run folders alone. Out: pictures, a page for each run and one that compares runs, tables, the model card."""
