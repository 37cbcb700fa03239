"""What a person looks at: the data report and the run report."""
