"""Write Core ML packages and the files that an app needs beside them, and prove them with our own evaluator."""
