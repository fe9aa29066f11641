"""The report: one static page over all runs of an outputs folder, with figures, tables and a browser of examples."""
