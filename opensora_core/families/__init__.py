"""One module a family of models: the rows that name their parts."""
