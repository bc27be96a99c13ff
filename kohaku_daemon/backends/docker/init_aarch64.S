/*
 * The first process of a task's container, for 64-bit ARM Linux. See init.py for what it is for,
 * its arguments and what it writes. Assembled by `as` alone, without libc or preprocessor;
 * init_x86_64.S is the same, step by step. After a change of either:
 * python -m tests.kohaku_daemon.backends.docker.assemble
 *
 * Kept over system calls, which change x0 only:
 *   x19  the stack as it was at the start: argc, argv[], 0, envp[], 0
 *   x20  where the program's own argv begins in it
 *   x21  descriptor of the status file; x22, x23 of the outputs
 *   x24  pid of the program
 *   x25  stage and x26 value of the record
 */
        .text

        .set SYS_dup3, 24
        .set SYS_openat, 56
        .set SYS_close, 57
        .set SYS_pipe2, 59
        .set SYS_read, 63
        .set SYS_write, 64
        .set SYS_exit_group, 94
        .set SYS_clock_gettime, 113
        .set SYS_kill, 129
        .set SYS_rt_sigaction, 134
        .set SYS_rt_sigprocmask, 135
        .set SYS_rt_sigtimedwait, 137
        .set SYS_setsid, 157
        .set SYS_getpid, 172
        .set SYS_clone, 220
        .set SYS_execve, 221
        .set SYS_wait4, 260

        .set AT_FDCWD, -100
        .set O_STATUS, 0x80641           /* O_CLOEXEC O_APPEND O_TRUNC O_CREAT O_WRONLY */
        .set O_OUTPUT, 0x80441           /* the same without O_TRUNC */
        .set O_CLOEXEC, 0x80000
        .set MODE, 0644                  /* who may not see them is kept off by their folder */
        .set SIG_SETMASK, 2
        .set SIGCHLD, 17
        .set SIGNALS, 64                 /* the kernel's own count, and the bits of its sigset_t */
        .set SIGSET, 8
        .set WNOHANG_ALL, 0x40000001     /* WNOHANG and __WALL */
        .set EPERM, 1
        .set ENOENT, 2
        .set EINTR, 4
        .set EBADF, 9
        .set EACCES, 13
        .set ENOTDIR, 20
        .set EINVAL, 22

        /* init.Stage */
        .set BEGUN, 1
        .set ENDED, 2
        .set NO_STDOUT, 3
        .set NO_STDERR, 4
        .set NO_PROCESS, 5
        .set NO_PROGRAM, 6

        .set REFUSED, 125                /* exit codes as of env, nohup and Docker itself */
        .set CANNOT_RUN, 126
        .set NOT_FOUND, 127

        .set FEWEST_ARGUMENTS, 6         /* init, three files, "", the program's name */

        /* Above sp: one record as it is written, then scratch. */
        .set RECORD, 0
        .set RECORD_STAGE, 8
        .set RECORD_VALUE, 12
        .set RECORD_AT, 16
        .set RECORD_SIZE, 24
        .set PIPE, 24
        .set SCRATCH, 32                 /* a timespec, an errno, a wait status */
        .set FRAME, 48

        .macro  call_kernel number
        mov     x8, \number
        svc     0
        .endm

start:
        mov     x19, sp
        sub     sp, sp, FRAME

/* Elsewhere kill(-1) would reach every process of the machine, and orphans would not come here. */
        call_kernel SYS_getpid
        mov     w2, EPERM
        adr     x1, not_first
        cmp     w0, 1
        b.ne    complain

/* The program's argv is used where it lies: it is what follows the empty argument. */
        mov     w2, EINVAL
        adr     x1, usage
        ldr     x0, [x19]
        cmp     x0, FEWEST_ARGUMENTS
        b.lo    complain
        add     x20, x19, 8 * 5
1:      ldr     x0, [x20], 8
        cbz     x0, complain
        ldrb    w0, [x0]
        cbnz    w0, 1b
        ldr     x0, [x20]
        cbz     x0, complain

/*
 * All signals are blocked before anything else: none is lost that comes before the program runs,
 * and the kernel keeps even those from the inside that the first process of a namespace has no
 * handler for, as only unblocked ones are dropped. Whoever started us may have had some ignored:
 * that would be the program's too, and with SIGCHLD ignored its status would be lost.
 */
        mov     w0, SIG_SETMASK
        adr     x1, every
        mov     x2, 0
        mov     x3, SIGSET
        call_kernel SYS_rt_sigprocmask
        mov     w21, SIGNALS
1:      mov     w0, w21
        adr     x1, default
        mov     x2, 0
        mov     x3, SIGSET
        call_kernel SYS_rt_sigaction     /* of SIGKILL and SIGSTOP it is refused, as it should */
        subs    w21, w21, 1
        b.ne    1b

/* The status file is first: what fails after it can be told there. */
        ldr     x1, [x19, 8 * 4]
        ldr     w2, status_flags
        bl      open
        ldr     x1, [x19, 8 * 4]
        mov     w21, w0
        neg     w2, w0
        tbnz    w0, 31, complain
        ldr     x1, [x19, 8 * 2]
        ldr     w2, output_flags
        bl      open
        mov     w25, NO_STDOUT
        mov     w22, w0
        tbnz    w0, 31, fail
        ldr     x1, [x19, 8 * 3]
        ldr     w2, output_flags
        bl      open
        mov     w25, NO_STDERR
        mov     w23, w0
        tbnz    w0, 31, fail

/*
 * A plain fork, and a pipe that execve closes: the child writes into it why there is no program,
 * and if it ends without a word there is one. So "could not be run" is never taken for a code
 * that the program gave, and "begun" is written only when it is true.
 */
        add     x0, sp, PIPE
        mov     w1, O_CLOEXEC
        call_kernel SYS_pipe2
        mov     w25, NO_PROCESS
        tbnz    w0, 31, fail
        mov     x0, SIGCHLD
        mov     x1, 0
        mov     x2, 0
        mov     x3, 0
        mov     x4, 0
        call_kernel SYS_clone
        tbnz    w0, 31, fail
        cbz     w0, child
        mov     w24, w0

/* We hold on to neither output: a log that is removed while the task runs gives back its space. */
        ldr     w0, [sp, PIPE + 4]
        call_kernel SYS_close
        mov     w0, w22
        call_kernel SYS_close
        mov     w0, w23
        call_kernel SYS_close

1:      ldr     w0, [sp, PIPE]
        add     x1, sp, SCRATCH
        mov     x2, 4
        call_kernel SYS_read
        cmn     w0, EINTR
        b.eq    1b
        cmp     w0, 0
        b.gt    not_run
        ldr     w0, [sp, PIPE]
        call_kernel SYS_close
        mov     w25, BEGUN
        mov     w26, 0
        bl      record

/*
 * From here on all that can happen is a signal. Several SIGCHLD come as one, so each is answered
 * by waiting for all who ended: the program, and orphans of its making. Without WUNTRACED, a
 * process that is stopped has not ended. Whoever is left when the program has ended is ended by
 * the kernel with us.
 */
reap:
        mov     w0, -1
        add     x1, sp, SCRATCH
        ldr     w2, wait_options
        mov     x3, 0
        call_kernel SYS_wait4
        cmp     w0, 0
        b.le    listen                   /* none has ended, or there are none: ECHILD */
        cmp     w0, w24
        b.ne    reap

        mov     w25, ENDED
        ldr     w26, [sp, SCRATCH]
        bl      record
        ubfx    w0, w26, 8, 8
        ands    w1, w26, 0x7f
        b.eq    exit
        add     w0, w1, 128              /* ended by a signal: 128 and its number, as of shells */
        b       exit

/* Any other signal is for the task: all of it, as its processes may be of several groups. */
listen:
        adr     x0, every
        mov     x1, 0
        mov     x2, 0
        mov     x3, SIGSET
        call_kernel SYS_rt_sigtimedwait
        cmp     w0, 0
        b.le    listen                   /* EINTR: stopped or frozen, and on again */
        cmp     w0, SIGCHLD
        b.eq    reap
        mov     w1, w0
        mov     w0, -1
        call_kernel SYS_kill
        b       listen

not_run:
        mov     w25, NO_PROGRAM
        ldr     w26, [sp, SCRATCH]
        bl      record
        mov     w0, NOT_FOUND
        cmp     w26, ENOENT
        b.eq    exit
        mov     w0, CANNOT_RUN
        b       exit

/* In the child. None of these can fail: it leads no group yet, and its descriptors are open. */
child:
        call_kernel SYS_setsid
        mov     w0, w22
        mov     w1, 1
        mov     w2, 0
        call_kernel SYS_dup3
        mov     w0, w23
        mov     w1, 2
        mov     w2, 0
        call_kernel SYS_dup3
        mov     w0, SIG_SETMASK
        adr     x1, default              /* nothing but zeros is the empty set too */
        mov     x2, 0
        mov     x3, SIGSET
        call_kernel SYS_rt_sigprocmask

/*
 * As execvp does, but for its shell where the format is unknown: who is not there is passed over,
 * who may not be run as well but is remembered, and anything else is the answer.
 */
        ldr     x0, [x19]
        add     x21, x19, x0, lsl 3
        add     x21, x21, 16
        add     x22, x19, 8 * 5
        mov     w23, ENOENT
1:      ldr     x0, [x22], 8
        ldrb    w1, [x0]
        cbz     w1, 2f
        mov     x1, x20
        mov     x2, x21
        call_kernel SYS_execve
        neg     w0, w0
        cmp     w0, ENOENT
        b.eq    1b
        cmp     w0, ENOTDIR
        b.eq    1b
        mov     w23, w0
        cmp     w0, EACCES
        b.eq    1b
2:      str     w23, [sp, SCRATCH]
        ldr     w0, [sp, PIPE + 4]
        add     x1, sp, SCRATCH
        mov     x2, 4
        call_kernel SYS_write
        mov     w0, NOT_FOUND
        b       exit

/*
 * Open the file named in x1 with the flags in w2: a descriptor or -errno in w0. One below 3 is
 * refused: we were started without some of the first three, and would mix up the outputs.
 */
open:
        mov     w0, AT_FDCWD
        mov     w3, MODE
        call_kernel SYS_openat
        cmp     w0, 3
        b.hs    1f                       /* unsigned: -errno is above too */
        mov     w0, -EBADF
1:      ret

/*
 * Write the stage in w25 and the value in w26 with the time to the status file, all at once.
 * There is nothing to do if it fails: the program runs, and whoever reads takes Docker's word.
 */
record:
        mov     x0, 0                    /* CLOCK_REALTIME */
        add     x1, sp, SCRATCH
        call_kernel SYS_clock_gettime
        ldp     x1, x2, [sp, SCRATCH]
        ldr     w0, second
        madd    x1, x1, x0, x2
        ldr     x0, magic
        str     x0, [sp, RECORD]
        stp     w25, w26, [sp, RECORD_STAGE]
        str     x1, [sp, RECORD_AT]
        mov     w0, w21
        add     x1, sp, RECORD
        mov     x2, RECORD_SIZE
        call_kernel SYS_write
        ret

/* End with the stage in w25 and -errno in w0 on record. */
fail:
        neg     w26, w0
        bl      record
        mov     w0, REFUSED
        b       exit

/* There is no status file to say it in: to stderr, Docker's log, errno in w2 and text in x1. */
complain:
        mov     x20, x1
        mov     w3, 10
        mov     w4, 0x203a               /* ": " */
        add     x22, sp, SCRATCH + 3
        str     w4, [x22]
        mov     w4, 3
1:      udiv    w5, w2, w3
        msub    w6, w5, w3, w2
        mov     w2, w5
        add     w6, w6, '0'
        strb    w6, [x22, -1]!
        subs    w4, w4, 1
        b.ne    1b
        adr     x1, name
        bl      say
        mov     x1, x22
        bl      say
        mov     x1, x20
        bl      say
        adr     x1, newline
        bl      say
        mov     w0, REFUSED

exit:
        call_kernel SYS_exit_group

/* Write the text in x1 to stderr. */
say:
        mov     x2, 0
1:      ldrb    w3, [x1, x2]
        cbz     w3, 2f
        add     x2, x2, 1
        b       1b
2:      mov     w0, 2
        call_kernel SYS_write
        ret

        .balign 8, 0
every:  .8byte  -1
default:                                 /* struct sigaction of the kernel: SIG_DFL, no flags */
        .zero   32
magic:  .ascii  "kohaku01"
status_flags:                            /* more bits than fit into an instruction, as below */
        .4byte  O_STATUS
output_flags:
        .4byte  O_OUTPUT
wait_options:
        .4byte  WNOHANG_ALL
second: .4byte  1000000000
name:   .asciz  "kohaku-init: errno "
newline:
        .asciz  "\n"
not_first:
        .asciz  "not the first process of a pid namespace"
usage:  .asciz  "wanted: STDOUT STDERR STATUS [CANDIDATE...] '' NAME [ARGUMENT...]"
