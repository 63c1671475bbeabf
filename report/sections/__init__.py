"""What the report says: each section reads JSON files, draws, and fills the template beside it. Imports no study."""
