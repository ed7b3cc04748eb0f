"""Problems of the literature with numbers that do not come from the code under test."""
