/*
 * The first process of a task's container, for x86-64 Linux. See init.py for what it is for, its
 * arguments and what it writes. Assembled by `as` alone, without libc or preprocessor;
 * init_aarch64.S is the same, step by step. After a change of either:
 * python -m tests.kohaku_daemon.backends.docker.assemble
 *
 * Kept over system calls, which change rax, rcx and r11 only:
 *   rbp  the stack as it was at the start: argc, argv[], 0, envp[], 0
 *   rbx  where the program's own argv begins in it
 *   r12  descriptor of the status file; r13, r14 of the outputs
 *   r15  pid of the program
 */
        .intel_syntax noprefix
        .text

        .set SYS_read, 0
        .set SYS_write, 1
        .set SYS_close, 3
        .set SYS_rt_sigaction, 13
        .set SYS_rt_sigprocmask, 14
        .set SYS_getpid, 39
        .set SYS_clone, 56
        .set SYS_execve, 59
        .set SYS_wait4, 61
        .set SYS_kill, 62
        .set SYS_setsid, 112
        .set SYS_rt_sigtimedwait, 128
        .set SYS_clock_gettime, 228
        .set SYS_exit_group, 231
        .set SYS_openat, 257
        .set SYS_dup3, 292
        .set SYS_pipe2, 293

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

        /* Below rbp: one record as it is written, then scratch. */
        .set RECORD, -24
        .set RECORD_STAGE, -16
        .set RECORD_VALUE, -12
        .set RECORD_AT, -8
        .set RECORD_SIZE, 24
        .set SCRATCH, -40                /* a timespec, an errno, a wait status */
        .set PIPE, -48
        .set FRAME, 48

start:
        mov     rbp, rsp
        sub     rsp, FRAME

/* Elsewhere kill(-1) would reach every process of the machine, and orphans would not come here. */
        mov     eax, SYS_getpid
        syscall
        mov     edi, EPERM
        lea     rsi, [rip + not_first]
        cmp     eax, 1
        jne     complain

/* The program's argv is used where it lies: it is what follows the empty argument. */
        mov     edi, EINVAL
        lea     rsi, [rip + usage]
        cmp     qword ptr [rbp], FEWEST_ARGUMENTS
        jb      complain
        lea     rbx, [rbp + 8 * 5]
1:      mov     rax, [rbx]
        add     rbx, 8
        test    rax, rax
        jz      complain
        cmp     byte ptr [rax], 0
        jne     1b
        cmp     qword ptr [rbx], 0
        je      complain

/*
 * All signals are blocked before anything else: none is lost that comes before the program runs,
 * and the kernel keeps even those from the inside that the first process of a namespace has no
 * handler for, as only unblocked ones are dropped. Whoever started us may have had some ignored:
 * that would be the program's too, and with SIGCHLD ignored its status would be lost.
 */
        mov     edi, SIG_SETMASK
        lea     rsi, [rip + every]
        xor     edx, edx
        mov     r10d, SIGSET
        mov     eax, SYS_rt_sigprocmask
        syscall
        mov     r12d, SIGNALS
1:      mov     edi, r12d
        lea     rsi, [rip + default]
        xor     edx, edx
        mov     r10d, SIGSET
        mov     eax, SYS_rt_sigaction    /* of SIGKILL and SIGSTOP it is refused, as it should */
        syscall
        dec     r12d
        jnz     1b

/* The status file is first: what fails after it can be told there. */
        mov     rsi, [rbp + 8 * 4]
        mov     edx, O_STATUS
        call    open
        mov     rsi, [rbp + 8 * 4]
        mov     r12d, eax
        mov     edi, eax
        neg     edi
        test    eax, eax
        js      complain
        mov     rsi, [rbp + 8 * 2]
        mov     edx, O_OUTPUT
        call    open
        mov     edi, NO_STDOUT
        mov     r13d, eax
        test    eax, eax
        js      fail
        mov     rsi, [rbp + 8 * 3]
        mov     edx, O_OUTPUT
        call    open
        mov     edi, NO_STDERR
        mov     r14d, eax
        test    eax, eax
        js      fail

/*
 * A plain fork, and a pipe that execve closes: the child writes into it why there is no program,
 * and if it ends without a word there is one. So "could not be run" is never taken for a code
 * that the program gave, and "begun" is written only when it is true.
 */
        lea     rdi, [rbp + PIPE]
        mov     esi, O_CLOEXEC
        mov     eax, SYS_pipe2
        syscall
        mov     edi, NO_PROCESS
        test    eax, eax
        js      fail
        mov     edi, SIGCHLD
        xor     esi, esi
        xor     edx, edx
        xor     r10d, r10d
        xor     r8d, r8d
        mov     eax, SYS_clone
        syscall
        mov     edi, NO_PROCESS
        test    eax, eax
        js      fail
        jz      child
        mov     r15d, eax

/* We hold on to neither output: a log that is removed while the task runs gives back its space. */
        mov     edi, [rbp + PIPE + 4]
        mov     eax, SYS_close
        syscall
        mov     edi, r13d
        mov     eax, SYS_close
        syscall
        mov     edi, r14d
        mov     eax, SYS_close
        syscall

1:      mov     edi, [rbp + PIPE]
        lea     rsi, [rbp + SCRATCH]
        mov     edx, 4
        xor     eax, eax                 /* SYS_read */
        syscall
        cmp     eax, -EINTR
        je      1b
        test    eax, eax
        jg      not_run
        mov     edi, [rbp + PIPE]
        mov     eax, SYS_close
        syscall
        mov     edi, BEGUN
        xor     esi, esi
        call    record

/*
 * From here on all that can happen is a signal. Several SIGCHLD come as one, so each is answered
 * by waiting for all who ended: the program, and orphans of its making. Without WUNTRACED, a
 * process that is stopped has not ended. Whoever is left when the program has ended is ended by
 * the kernel with us.
 */
reap:
        mov     edi, -1
        lea     rsi, [rbp + SCRATCH]
        mov     edx, WNOHANG_ALL
        xor     r10d, r10d
        mov     eax, SYS_wait4
        syscall
        test    eax, eax
        jle     listen                   /* none has ended, or there are none: ECHILD */
        cmp     eax, r15d
        jne     reap

        mov     edi, ENDED
        mov     esi, [rbp + SCRATCH]
        call    record
        mov     eax, [rbp + RECORD_VALUE]
        mov     edi, eax
        and     edi, 0x7f
        jz      1f
        add     edi, 128                 /* ended by a signal: 128 and its number, as of shells */
        jmp     exit
1:      movzx   edi, ah
        jmp     exit

/* Any other signal is for the task: all of it, as its processes may be of several groups. */
listen:
        lea     rdi, [rip + every]
        xor     esi, esi
        xor     edx, edx
        mov     r10d, SIGSET
        mov     eax, SYS_rt_sigtimedwait
        syscall
        test    eax, eax
        jle     listen                   /* EINTR: stopped or frozen, and on again */
        cmp     eax, SIGCHLD
        je      reap
        mov     edi, -1
        mov     esi, eax
        mov     eax, SYS_kill
        syscall
        jmp     listen

not_run:
        mov     edi, NO_PROGRAM
        mov     esi, [rbp + SCRATCH]
        call    record
        mov     edi, CANNOT_RUN
        cmp     dword ptr [rbp + RECORD_VALUE], ENOENT
        jne     exit
        mov     edi, NOT_FOUND
        jmp     exit

/* In the child. None of these can fail: it leads no group yet, and its descriptors are open. */
child:
        mov     eax, SYS_setsid
        syscall
        mov     edi, r13d
        mov     esi, 1
        xor     edx, edx
        mov     eax, SYS_dup3
        syscall
        mov     edi, r14d
        mov     esi, 2
        xor     edx, edx
        mov     eax, SYS_dup3
        syscall
        mov     edi, SIG_SETMASK
        lea     rsi, [rip + default]     /* nothing but zeros is the empty set too */
        xor     edx, edx
        mov     r10d, SIGSET
        mov     eax, SYS_rt_sigprocmask
        syscall

/*
 * As execvp does, but for its shell where the format is unknown: who is not there is passed over,
 * who may not be run as well but is remembered, and anything else is the answer.
 */
        mov     rax, [rbp]
        lea     r12, [rbp + 8 * rax + 16]
        lea     r13, [rbp + 8 * 5]
        mov     r14d, ENOENT
1:      mov     rdi, [r13]
        add     r13, 8
        cmp     byte ptr [rdi], 0
        je      2f
        mov     rsi, rbx
        mov     rdx, r12
        mov     eax, SYS_execve
        syscall
        cmp     eax, -ENOENT
        je      1b
        cmp     eax, -ENOTDIR
        je      1b
        neg     eax
        mov     r14d, eax
        cmp     eax, EACCES
        je      1b
2:      mov     [rbp + SCRATCH], r14d
        mov     edi, [rbp + PIPE + 4]
        lea     rsi, [rbp + SCRATCH]
        mov     edx, 4
        mov     eax, SYS_write
        syscall
        mov     edi, NOT_FOUND
        jmp     exit

/*
 * Open the file named in rsi with the flags in edx: a descriptor or -errno in eax. One below
 * 3 is refused: we were started without some of the first three, and would mix up the outputs.
 */
open:
        mov     edi, AT_FDCWD
        mov     r10d, MODE
        mov     eax, SYS_openat
        syscall
        cmp     eax, 3
        jae     1f                       /* unsigned: -errno is above too */
        mov     eax, -EBADF
1:      ret

/*
 * Write the stage in edi and the value in esi with the time to the status file, all at once.
 * There is nothing to do if it fails: the program runs, and whoever reads takes Docker's word.
 */
record:
        mov     rax, [rip + magic]
        mov     [rbp + RECORD], rax
        mov     [rbp + RECORD_STAGE], edi
        mov     [rbp + RECORD_VALUE], esi
        xor     edi, edi                 /* CLOCK_REALTIME */
        lea     rsi, [rbp + SCRATCH]
        mov     eax, SYS_clock_gettime
        syscall
        imul    rax, [rbp + SCRATCH], 1000000000
        add     rax, [rbp + SCRATCH + 8]
        mov     [rbp + RECORD_AT], rax
        mov     edi, r12d
        lea     rsi, [rbp + RECORD]
        mov     edx, RECORD_SIZE
        mov     eax, SYS_write
        syscall
        ret

/* End with the stage in edi and -errno in eax on record. */
fail:
        mov     esi, eax
        neg     esi
        call    record
        mov     edi, REFUSED
        jmp     exit

/* There is no status file to say it in: to stderr, Docker's log, errno in edi and text in rsi. */
complain:
        mov     rbx, rsi
        mov     eax, edi
        mov     ecx, 10
        lea     r13, [rbp + SCRATCH + 3]
        mov     dword ptr [r13], 0x203a  /* ": " */
        mov     r14d, 3
1:      xor     edx, edx
        div     ecx
        add     edx, '0'
        dec     r13
        mov     [r13], dl
        dec     r14d
        jnz     1b
        lea     rsi, [rip + name]
        call    say
        mov     rsi, r13
        call    say
        mov     rsi, rbx
        call    say
        lea     rsi, [rip + newline]
        call    say
        mov     edi, REFUSED

exit:
        mov     eax, SYS_exit_group
        syscall

/* Write the text in rsi to stderr. */
say:
        xor     edx, edx
1:      cmp     byte ptr [rsi + rdx], 0
        je      2f
        inc     edx
        jmp     1b
2:      mov     edi, 2
        mov     eax, SYS_write
        syscall
        ret

        .balign 8, 0
every:  .8byte  -1
default:                                 /* struct sigaction of the kernel: SIG_DFL, no flags */
        .zero   32
magic:  .ascii  "kohaku01"
name:   .asciz  "kohaku-init: errno "
newline:
        .asciz  "\n"
not_first:
        .asciz  "not the first process of a pid namespace"
usage:  .asciz  "wanted: STDOUT STDERR STATUS [CANDIDATE...] '' NAME [ARGUMENT...]"
