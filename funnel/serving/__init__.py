"""The HTTP server behind `funnel serve`: a JSON API, a web page, file jobs and metrics for text classifiers (extra: serve)."""
