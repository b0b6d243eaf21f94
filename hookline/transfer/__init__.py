"""Moving data: from and to the replaced service's JSON file, and between databases."""
