"""MODA in other people's libraries, one folder each. None of them is imported by the package itself."""
