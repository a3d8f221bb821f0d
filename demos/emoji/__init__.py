"""How `emoji-flux` was made: data, models, the three training stages, export and measurement."""
