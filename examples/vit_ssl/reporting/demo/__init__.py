"""The report of `demo.py`: its words, its figures and the page that holds both."""
