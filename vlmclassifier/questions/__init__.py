"""Knowledge questions about images: multiple-choice questions, parsers of answers, and their scores (section 4)."""
