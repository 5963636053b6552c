"""Where corpora lie and how their files are opened: paths and addresses, tars, records, stores of images."""
