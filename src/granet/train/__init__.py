"""The application: recipes, data and models, and the runs that train them."""
