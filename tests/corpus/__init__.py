"""Three hundred bad or odd inputs: files, settings and names that persons and programs made, and the right answer to each."""
