"""What the report computes: each study runs for minutes to hours and leaves a JSON file. No drawing, no wording."""
