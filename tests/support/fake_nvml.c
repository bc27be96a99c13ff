/* A stand-in for NVIDIA's libnvidia-ml.so.1, so that GPU code runs on machines without one.
 *
 * Build:  gcc -shared -fPIC -Wl,-soname,libnvidia-ml.so.1 -o DIR/libnvidia-ml.so.1 fake_nvml.c
 *         with -DOLD_DRIVER to leave out what drivers before 510 do not have
 * Use:    LD_LIBRARY_PATH=DIR FAKE_NVML=STATE program
 *
 * STATE is a text file, read again at every call, so that a test can change it at any time.
 * One GPU a line, words KEY=VALUE in any order ("_" in a name is shown as a blank):
 *
 *     uuid=GPU-1 name=Fake_A100 bus=00000000:3B:00.0 total=81920 used=1024 busy=37
 *     temperature=55 fan=30 power=250000 limit=400000 error=0 compute=4711:512,4712 graphics=1:4
 *     mig=1
 *
 * total and used are MiB, power and limit milliwatts. A value that is not given is "not
 * supported" by that GPU. error=N makes every question about the GPU answer with error N.
 * compute and graphics are processes, PID:MiB, or PID alone where the driver does not say.
 *
 * mig=1 is a GPU divided into MIG instances, mig=0 one that could be. A line of an instance has
 * parent=UUID and place=N, its place on that GPU; it is no GPU to those who count GPUs.
 * A GPU whose line is gone is lost. A file without GPUs, or no file, is a driver that is
 * not loaded. Numbers of errors and layouts of structures: nvml.h of the CUDA toolkit.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    SUCCESS = 0,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9,
    GPU_IS_LOST = 15,
};
enum { MOST_GPUS = 32, MOST_PLACES = 7, TEXT = 80, LIST = 2048, NOT_GIVEN = -1, MIB = 1 << 20 };

struct gpu {
    char uuid[TEXT], name[TEXT], bus[TEXT], parent[TEXT], compute[LIST], graphics[LIST];
    long long total, used, busy, temperature, fan, power, limit, error, mig, place;
};

/* A handle is one more than a slot in here: it names the same GPU whatever becomes of the file. */
static char seen[MOST_GPUS][TEXT];

static void set(struct gpu *gpu, const char *key, const char *value)
{
    struct { const char *key; char *text; size_t size; } texts[] = {
        {"uuid", gpu->uuid, TEXT}, {"name", gpu->name, TEXT}, {"bus", gpu->bus, TEXT},
        {"parent", gpu->parent, TEXT}, {"compute", gpu->compute, LIST},
        {"graphics", gpu->graphics, LIST},
    };
    struct { const char *key; long long *number; } numbers[] = {
        {"total", &gpu->total}, {"used", &gpu->used}, {"busy", &gpu->busy},
        {"temperature", &gpu->temperature}, {"fan", &gpu->fan}, {"power", &gpu->power},
        {"limit", &gpu->limit}, {"error", &gpu->error}, {"mig", &gpu->mig},
        {"place", &gpu->place},
    };
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        if (!strcmp(key, texts[i].key))
            snprintf(texts[i].text, texts[i].size, "%s", value);
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (!strcmp(key, numbers[i].key))
            *numbers[i].number = atoll(value);
}

/* Whole GPUs, and after them the MIG instances; only the former are counted. */
static int load_all(struct gpu *gpus, int *whole)
{
    const char *path = getenv("FAKE_NVML");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[2 * LIST];
    int count = 0;

    while (file && count < MOST_GPUS && fgets(line, sizeof line, file)) {
        struct gpu gpu = {.total = NOT_GIVEN, .used = NOT_GIVEN, .busy = NOT_GIVEN,
                          .temperature = NOT_GIVEN, .fan = NOT_GIVEN, .power = NOT_GIVEN,
                          .limit = NOT_GIVEN, .mig = NOT_GIVEN};
        for (char *rest = line, *word; (word = strtok_r(rest, " \n", &rest));) {
            char *value = strchr(word, '=');
            if (value) {
                *value++ = '\0';
                set(&gpu, word, value);
            }
        }
        for (char *c = gpu.name; *c; c++)
            if (*c == '_')
                *c = ' ';
        if (*gpu.uuid)
            gpus[count++] = gpu;
    }
    if (file)
        fclose(file);

    struct gpu sorted[MOST_GPUS];
    int place = 0;
    for (int i = 0; i < count; i++)
        if (!*gpus[i].parent)
            sorted[place++] = gpus[i];
    *whole = place;
    for (int i = 0; i < count; i++)
        if (*gpus[i].parent)
            sorted[place++] = gpus[i];
    memcpy(gpus, sorted, sizeof *gpus * (size_t)count);
    return count;
}

static int load(struct gpu *gpus)
{
    int whole;
    load_all(gpus, &whole);
    return whole;
}

static void *handle_of(const char *uuid)
{
    for (long place = 0; place < MOST_GPUS; place++) {
        if (!*seen[place])
            snprintf(seen[place], TEXT, "%s", uuid);
        if (!strcmp(seen[place], uuid))
            return (void *)(place + 1);
    }
    return NULL;
}

static int find(void *handle, struct gpu *found)
{
    struct gpu gpus[MOST_GPUS];
    long place = (long)handle - 1;
    int whole, count = load_all(gpus, &whole);

    if (place < 0 || place >= MOST_GPUS)
        return INVALID_ARGUMENT;
    for (int i = 0; i < count; i++)
        if (!strcmp(gpus[i].uuid, seen[place])) {
            *found = gpus[i];
            return (int)gpus[i].error;
        }
    return GPU_IS_LOST;
}

static int give_text(void *handle, size_t offset, char *text, unsigned size)
{
    struct gpu gpu;
    int error = find(handle, &gpu);
    if (error)
        return error;
    const char *value = (char *)&gpu + offset;
    if (strlen(value) >= size)
        return INSUFFICIENT_SIZE;
    strcpy(text, value);
    return SUCCESS;
}

static int give_number(void *handle, size_t offset, unsigned *number)
{
    struct gpu gpu;
    int error = find(handle, &gpu);
    if (error)
        return error;
    long long value;
    memcpy(&value, (char *)&gpu + offset, sizeof value);
    if (value == NOT_GIVEN)
        return NOT_SUPPORTED;
    *number = (unsigned)value;
    return SUCCESS;
}

#define FIELD(name) __builtin_offsetof(struct gpu, name)

int nvmlInitWithFlags(unsigned flags)
{
    struct gpu gpus[MOST_GPUS];
    (void)flags;
    return load(gpus) ? SUCCESS : DRIVER_NOT_LOADED;
}

int nvmlShutdown(void) { return SUCCESS; }

int nvmlDeviceGetCount_v2(unsigned *count)
{
    struct gpu gpus[MOST_GPUS];
    *count = (unsigned)load(gpus);
    return *count ? SUCCESS : DRIVER_NOT_LOADED;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle)
{
    struct gpu gpus[MOST_GPUS];
    if (index >= (unsigned)load(gpus))
        return INVALID_ARGUMENT;
    *handle = handle_of(gpus[index].uuid);
    return (int)gpus[index].error;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle)
{
    struct gpu gpus[MOST_GPUS];
    int whole, count = load_all(gpus, &whole);
    for (int i = 0; i < count; i++)
        if (!strcmp(gpus[i].uuid, uuid)) {
            *handle = handle_of(uuid);
            return (int)gpus[i].error;
        }
    return NOT_FOUND;
}

int nvmlDeviceGetUUID(void *handle, char *text, unsigned size)
{
    return give_text(handle, FIELD(uuid), text, size);
}

int nvmlDeviceGetName(void *handle, char *text, unsigned size)
{
    return give_text(handle, FIELD(name), text, size);
}

struct pci {
    char legacy_bus[16];
    unsigned domain, bus, device, device_id, subsystem_id;
    char bus_text[32];
};

int nvmlDeviceGetPciInfo_v3(void *handle, struct pci *info)
{
    struct gpu gpu;
    int error = find(handle, &gpu);
    if (error)
        return error;
    memset(info, 0, sizeof *info);
    snprintf(info->bus_text, sizeof info->bus_text, "%.31s", gpu.bus);
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(void *handle, unsigned long long *info) /* total, free, used */
{
    struct gpu gpu;
    int error = find(handle, &gpu);
    if (error)
        return error;
    info[0] = (unsigned long long)gpu.total * MIB;
    info[1] = (unsigned long long)(gpu.total - gpu.used) * MIB;
    info[2] = (unsigned long long)gpu.used * MIB;
    return SUCCESS;
}

struct utilization { unsigned gpu, memory; };

int nvmlDeviceGetUtilizationRates(void *handle, struct utilization *rates)
{
    rates->memory = 0;
    return give_number(handle, FIELD(busy), &rates->gpu);
}

int nvmlDeviceGetTemperature(void *handle, unsigned sensor, unsigned *degrees)
{
    (void)sensor;
    return give_number(handle, FIELD(temperature), degrees);
}

int nvmlDeviceGetFanSpeed(void *handle, unsigned *percent)
{
    return give_number(handle, FIELD(fan), percent);
}

int nvmlDeviceGetPowerUsage(void *handle, unsigned *milliwatts)
{
    return give_number(handle, FIELD(power), milliwatts);
}

int nvmlDeviceGetEnforcedPowerLimit(void *handle, unsigned *milliwatts)
{
    return give_number(handle, FIELD(limit), milliwatts);
}

int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending)
{
    int error = give_number(handle, FIELD(mig), current);
    *pending = *current;
    return error;
}

int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *count)
{
    unsigned mode;
    int error = give_number(handle, FIELD(mig), &mode);
    *count = MOST_PLACES;
    return error;
}

int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned place, void **instance)
{
    struct gpu gpus[MOST_GPUS], parent;
    int error = find(handle, &parent);
    if (error)
        return error;
    int whole, count = load_all(gpus, &whole);
    for (int i = whole; i < count; i++)
        if (!strcmp(gpus[i].parent, parent.uuid) && gpus[i].place == place) {
            *instance = handle_of(gpus[i].uuid);
            return (int)gpus[i].error;
        }
    return place < MOST_PLACES ? NOT_FOUND : INVALID_ARGUMENT;
}

struct process { unsigned pid; unsigned long long used; unsigned instance, compute_instance; };

/* The caller says how many there is room for, and is told how many there are. */
static int give_processes(void *handle, size_t offset, unsigned *count, struct process *found)
{
    struct gpu gpu;
    unsigned room = *count;
    int error = find(handle, &gpu);
    if (error)
        return error;
    *count = 0;
    for (char *rest = (char *)&gpu + offset, *word; (word = strtok_r(rest, ",", &rest));) {
        char *used = strchr(word, ':');
        if (++*count > room)
            continue;
        found[*count - 1] = (struct process){
            .pid = (unsigned)atoll(word),
            .used = used ? (unsigned long long)atoll(used + 1) * MIB : ~0ull,
            .instance = ~0u,
            .compute_instance = ~0u,
        };
    }
    return *count > room ? INSUFFICIENT_SIZE : SUCCESS;
}

#ifdef OLD_DRIVER
#define VERSION(name) name##_v2
#else
#define VERSION(name) name##_v3
#endif

int VERSION(nvmlDeviceGetComputeRunningProcesses)(void *handle, unsigned *count, struct process *to)
{
    return give_processes(handle, FIELD(compute), count, to);
}

int VERSION(nvmlDeviceGetGraphicsRunningProcesses)(void *handle, unsigned *count, struct process *to)
{
    return give_processes(handle, FIELD(graphics), count, to);
}

#ifndef OLD_DRIVER

struct memory_v2 { unsigned version; unsigned long long total, reserved, free, used; };

int nvmlDeviceGetMemoryInfo_v2(void *handle, struct memory_v2 *info)
{
    unsigned long long v1[3];
    int error = nvmlDeviceGetMemoryInfo(handle, v1);
    if (error)
        return error;
    info->total = v1[0];
    info->reserved = 0;
    info->free = v1[1];
    info->used = v1[2];
    return SUCCESS;
}

struct temperature { unsigned version, sensor; int degrees; };

int nvmlDeviceGetTemperatureV(void *handle, struct temperature *reading)
{
    return give_number(handle, FIELD(temperature), (unsigned *)&reading->degrees);
}

#endif
