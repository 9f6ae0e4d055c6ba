"""The words and the decisions of the product. Standard library only."""
