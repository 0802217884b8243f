# SPDX-License-Identifier: Apache-2.0
"""Commands that train or time several methods and compare them: demo, study, benchmark, plan.

What one method does in one run belongs to callbacks, pipelines and models.
"""
