"""One short file per verb: a request and the store in, an artifact out. Runs wherever it is called; knows no Ray."""
