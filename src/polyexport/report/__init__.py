"""What came out of an export: as records, tables, pages and files."""
