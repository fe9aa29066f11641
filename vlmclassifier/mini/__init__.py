"""Mini models trained from scratch on a small data set, and the study on them: corpus, recipes, training, findings."""
