"""HTML pages, their templates and figures."""
