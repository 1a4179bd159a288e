"""What a user reads: warnings, tables, notes about many layers. Imports no other folder."""
