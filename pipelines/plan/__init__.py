"""What a recipe takes before it runs: memory, disk, hours and cost. See `plan.plan_recipe`."""
