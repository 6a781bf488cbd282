"""The texts of the chat's /help."""

from __future__ import annotations

__all__ = ["COMMANDS", "STATS"]

COMMANDS = '''\
/reset, /clear     forget the conversation
/stats             what the last reply cost
/regenerate        ask the last question again
/undo              take back the last question and its reply
/system [TEXT]     what the model is told before the conversation; alone, nothing
/read FILE         say a file's text
/reasoning [KIND]  what the model reasoned last; dim, fold: how it is shown; off: none
/set [NAME VALUE]  change how replies are sampled, the experts per token or the scheduler; alone, show how
/bits N            from now on experts run at N bits: fewer are faster and worse; alone, which there are
/adapter [NAME]    from now on with this adapter, none for the model alone; alone, which there are
/save FILE         write the conversation to a file
/load FILE         go on with a saved one
/sessions          the conversations that --session NAME has kept
/help [stats]      this, or what the words of --stats full mean
/quit, /exit, /bye  leave, as Ctrl-D does
Ctrl-C stops a reply. Alt-Enter, or a backslash at the end, goes on in a new line; """ alone
begins and ends several. What begins with / and is no command needs a space before it. What you type
is kept for the arrow keys of later chats, in a file that only you can read; --no-history keeps nothing.'''

STATS = """\
36 prompt + 100 tokens   tokens that were read and written
first 0.11 s             from the question to the first token
hit 87.3%                share of experts that were in memory when they were wanted
dropped 6659             experts that had to leave memory for others
read 0.86 GB             from the model's file
8.0 bits                 of an expert's weight, on average
skipped, substituted     experts that the router chose and that did not run, of lossy schedulers
look-ahead 79% right     share of reads ahead whose expert was then wanted
T1 0.60, T2 0.90         thresholds of the scheduler hobbit: edgemoe schedulers
peak 196 MiB             most memory of the whole process since its start
#b32109b8                checksum of the last logits: the same for the same model, bits and prompt"""
