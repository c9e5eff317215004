"""What a person looks at: console, report page, estimate, data report, samples, comparison, export."""
