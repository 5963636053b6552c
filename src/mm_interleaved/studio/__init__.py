"""The studio: a web page on which a document of texts and images is written, part by part, with a model."""
