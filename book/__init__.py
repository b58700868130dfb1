"The book: every notebook with its outputs, and pages of the API, as one static site."
