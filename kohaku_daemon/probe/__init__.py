"""Reading the machine: each module one reader of files and its pure parsers.

Every reader takes a root folder, so that tests give it a machine of their own.
"""
