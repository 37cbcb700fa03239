"""Reports for users: terminal output, HTML pages, the model card, `report.json` and the preflight advice."""
