"""Drop-in replacements: the class names and signatures of the original repositories, one module each."""
