"""The command ``kohaku``: one module for each family of commands. Never imports Textual."""
