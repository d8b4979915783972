"""The results of an export: as records, tables, pages and files."""
